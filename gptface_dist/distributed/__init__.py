"""Who a process is among the others, how they meet, act together, notice a failure, and end."""
