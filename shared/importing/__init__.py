"""Somebody's files, as typed events and items.

readers     files to column chunks
mapping     the YAML that says which column is what
typed_rows  text columns to typed columns; names every bad row
events      rows to events: kinds, guests, orders, ids
catalogue   item files, and items derived from events
data_set    a directory and its mapping, opened
upload      batches into the services
"""
