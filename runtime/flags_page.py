"""Writes docs/flags.md: python -m runtime.flags_page"""
import os

import main  # noqa: F401  (declares the flags)
from runtime import flags
from runtime.files import write_atomically

PAGE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'docs', 'flags.md')

if __name__ == '__main__':
    write_atomically(PAGE, flags.markdown().encode())
