"""AVAR on megatron-core: masses in core attention, AGTO in the layers, and the engine of verl's Megatron backend."""
