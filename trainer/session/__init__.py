"""One start of a run: its state, its model on the devices, what each step leaves."""
