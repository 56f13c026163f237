"""Who does what: the plan of units, one unit of work, and the executors."""
