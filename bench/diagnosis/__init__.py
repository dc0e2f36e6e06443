"""A job's bottleneck from its profile: facts (``facts``), a rule a cause (``causes``), one name
(``verdict``)."""
