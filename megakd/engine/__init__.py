"""Engines, sharding and ranks: the only subpackage that imports deepspeed."""
