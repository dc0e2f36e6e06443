"""What is disaggregated serving? When might we want to avoid it?"""
