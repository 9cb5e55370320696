"""The only room that imports deepspeed: engines, sharding, ranks."""
