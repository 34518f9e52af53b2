"""Predictions about runs, by arithmetic: scaling laws, cost, memory, the planner."""
