# Several processes with megalodon.cu's kernels on the CPU, against one with megalodon.c. Run by `make test-emulated`.
export CUDA_ON_CPU_SHARED=1 OMP_NUM_THREADS=1
exec sh tests/test_mpi.sh build/emulated/train_fp32
