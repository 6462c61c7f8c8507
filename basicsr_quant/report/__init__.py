"""What people read: result files, tables, the card of a plan."""
