"""From a sample number to a micro-batch on the device."""
