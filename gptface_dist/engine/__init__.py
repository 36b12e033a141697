"""The training engine: megatron-core's pipeline schedules over stages that DeepSpeed's ZeRO shards."""
