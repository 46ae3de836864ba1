"""Names and signatures of other libraries' losses, computed by this one."""
