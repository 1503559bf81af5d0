"""vLLM, colocated or on servers. Nothing is imported here: the server's modules load without the trainer's."""
