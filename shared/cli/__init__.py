"""The command line `shopkeeper`: speaks to the services through their stubs, never imports them.

app           the commands, their options and help
output        tables for people, JSON for programs, errors in one line
progress      bars on a terminal, occasional lines elsewhere
installation  the home directory, addresses, what is running
supervisor    starts four processes and a database, restarts what crashes, drains on a signal
clients       stubs by service
import_data, simulate, train, recommendations, people, doctor, demo   what the commands do
"""
