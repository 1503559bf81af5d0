"""Two model families of one's own: Mistral, and ByteDance's Seed-OSS."""

from megatron_opd.weights.families import Family

# As llama, but for a window of attention that some of its models have and Megatron-Core would leave out.
MISTRAL = Family(like="llama", only={"sliding_window": None})

# As qwen2, whose q, k and v have biases; config.json says so, and could ask for one of the output, too.
SEED_OSS = Family(like="qwen2", only={"attention_bias": True, "attention_out_bias": False})
