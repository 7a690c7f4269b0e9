"""qaflora chat"""
