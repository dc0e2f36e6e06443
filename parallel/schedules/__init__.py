"""Pipeline schedules as data: one short file a schedule, what validates them, and what simulates them."""
