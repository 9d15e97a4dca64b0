"""Ask an exported model questions.

usage: python recipes/quickstart/chat.py MODEL_DIR [QUESTION]

Without a QUESTION they are read from the terminal, one on each line.
"""

from __future__ import annotations

import sys

from transformers import pipeline


def main() -> None:
    answer = pipeline("text-generation", model=sys.argv[1])
    for question in sys.argv[2:] or sys.stdin:
        messages = [{"role": "user", "content": question.strip()}]
        reply = answer(messages, max_new_tokens=128, do_sample=False, return_full_text=False)
        print(reply[0]["generated_text"], flush=True)


if __name__ == "__main__":
    main()
