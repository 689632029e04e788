"""The decode benchmark; the same as `pdlm bench decode`.

python benchmarks/decode.py --shape small --regions 4 --batch 1,8 --scaling --json benchmarks/results/decode_cpu.json
"""

import typer

from pdlm_hf.cli.bench import decode

if __name__ == "__main__":
    typer.run(decode)
