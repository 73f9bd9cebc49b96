"""Generated from proto/dreamfeed/v1/dreamfeed.proto by generate_stubs.py. Do not edit."""
