"""A run folder: open it, train arms, export, evaluate, and share arms between processes. It names no method."""
