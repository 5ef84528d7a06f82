"""AVAR on megatron-core: masses in its core attention, AGTO in its layers, and the engine for verl's Megatron backend."""
