"""The study: does refinement improve recommendations, when, and why?"""
