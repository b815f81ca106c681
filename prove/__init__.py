"""Proofs: each attacks a real house from outside and judges it by what it leaves behind."""
