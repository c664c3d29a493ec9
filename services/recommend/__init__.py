"""The recommend service: what shall I show this person, here, now?"""
