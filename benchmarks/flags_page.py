"""Writes docs/flags.md from the declarations in main.py: python benchmarks/flags_page.py"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import main  # noqa: E402, F401  (declares the flags)
from runtime.cli import flags  # noqa: E402
from runtime.system.files import write_atomically  # noqa: E402

if __name__ == '__main__':
    write_atomically(os.path.join(ROOT, 'docs', 'flags.md'), flags.markdown().encode())
