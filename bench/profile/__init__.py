"""``perflab profile``: a program or a lab's variant under a profiler, its code unchanged; a report a rank."""
