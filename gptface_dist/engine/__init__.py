"""One optimizer step of the composed whole: megatron-core schedules over stages that DeepSpeed shards."""
