# Several processes with megalodon.cu's kernels on the CPU, against one with megalodon.c. Run by `make test-emulated`.
exec sh tests/test_mpi.sh build/emulated/train_fp32
