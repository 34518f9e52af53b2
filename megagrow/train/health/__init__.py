"""Run health: monitoring, recovery, locks and signals."""
