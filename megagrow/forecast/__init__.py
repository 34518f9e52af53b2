"""Arithmetic about runs that have not run: scaling laws, cost, memory, the planner."""
