"""Many results beside each other: studies collected from runs, their statistics, tables and figures."""
