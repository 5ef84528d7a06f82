"""AVAR on verl: platform, engine, SFT and RL."""
