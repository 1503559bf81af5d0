"""Turns public data files into our JSONL (`convert`) and checks prompts files (`validate`); see --help."""

import sys

from megatron_opd.data.prepare import main

if __name__ == "__main__":
    sys.exit(main())
