"""Mixture-of-Experts layers.

A router decides, admission drops, transport moves rows, experts compute, balance reports.
"""
