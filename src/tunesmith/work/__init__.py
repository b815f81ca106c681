"""The hands: claim, supervise, report."""
