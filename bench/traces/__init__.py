"""Profiler reports: read any, break one down, put ranks side by side, compare two."""
