"""The ends of a conversion: each reads or writes the slots of a model in one format, and knows no other format."""
