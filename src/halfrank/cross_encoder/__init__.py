"""The public face: `CrossEncoder`, signature-compatible with sentence-transformers."""

from __future__ import annotations

from halfrank.cross_encoder.face import CrossEncoder

__all__ = ["CrossEncoder"]
