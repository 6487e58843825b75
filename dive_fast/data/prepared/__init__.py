"""Prepared data sets: conversion, on-disk format, writer and reader."""
