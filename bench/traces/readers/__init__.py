"""One small reader for each kind of profiler report, each returning a ``Trace``."""
