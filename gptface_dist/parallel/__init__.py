"""Placement of the model over processes: megatron-core's layers and process groups, and the table of legal layouts."""
