"""VLMEvalKit and lmms-eval, driven in an environment of their own through a proxy that keeps whole responses."""
