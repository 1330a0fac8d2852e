"""How soon a vision-language model answers: python scripts/first_token.py

Times the first token of LLaVA with CLIP ViT-B/16 and a language model of the size of SmolLM2 135M,
with random weights: unpatched, with merged tokens in the tower alone, and with as many visual
tokens in the prompt as are left (unmerge=False). Rounds are interleaved.
"""

from benchmarks.first_token.command import main

if __name__ == "__main__":
    main(doc=__doc__)
