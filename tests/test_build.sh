# The flags of a build: what the command line and the environment give reaches compiler and linker, after the build's own
# flags, and the last line of make tells what was built. Works in a copy. From the repository's root.
root=$PWD tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0
unset MAKEFLAGS GNUMAKEFLAGS MAKELEVEL MFLAGS CFLAGS CPPFLAGS LDFLAGS LDLIBS CXXFLAGS NVCCFLAGS NVCC CUARCH BLAS \
    WERROR SANITIZE PORTABLE NO_OMP NO_BLAS NO_MPI
cc=${CC:-cc}

verdict() { # STATUS TEXT
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)) word=ok; else failed=$((failed + 1)) word=FAIL; fi
    printf '%-4s  %s\n' $word "$2"
    if [ "$1" -ne 0 ]; then tail -n 4 "$tmp/out" | cut -c 1-300 | sed 's/^/      /'; fi
}
cp -R Makefile ./*.c ./*.cu ./*.h plumbing kernels tests "$tmp"
mkdir "$tmp/dev" && cp dev/*.c dev/*.cu "$tmp/dev"
cd "$tmp" || exit 1

plan() { ${MAKE:-make} -n "$@" > out 2>&1; } # the commands, which are not run
compiled() { grep -e '-c plumbing/json.c' out; }
linked() { grep -e '-o compare$' out; }
last() { tail -n 1 out; }
has() { case " $1 " in *" $2 "*) ;; *) return 1 ;; esac; }
after() { has "$1" "$2" && has "${1#*" $2 "}" "$3"; }

# What is there without flags: the same must be there with them, and be said.
plan
default_omp=$(linked | grep -c -e ' -fopenmp ' -e ' -lomp ') default_blas=$(compiled | grep -c -e '-DMEGALODON_BLAS')
told() { # does the last line say of OpenMP and BLAS what the commands do?
    omp=$(linked | grep -c -e ' -fopenmp ' -e ' -lomp ') blas=$(compiled | grep -c -e ' -DMEGALODON_BLAS ')
    case $(last) in *', no OpenMP,'*) [ "$omp" -eq 0 ] ;; *', OpenMP,'*) [ "$omp" -eq 1 ] ;; *) false ;; esac &&
        case $(last) in *', own matrix product,'*) [ "$blas" -eq 0 ] ;; *', BLAS '*) [ "$blas" -eq 1 ] ;; *) false ;; esac
}
kept() { told && [ "$omp" -eq "$default_omp" ] && [ "$blas" -eq "$default_blas" ]; }
kept
verdict $? "make: OpenMP and BLAS are as the last line says"

plan CFLAGS=-O2
kept && after "$(compiled)" -O3 -O2 && has "$(compiled)" -std=gnu11 && after "$(linked)" -O3 -O2
verdict $? "make CFLAGS=-O2: -O2 stands after -O3, OpenMP and BLAS stay"
case $(last) in *'CFLAGS="-O2"'*) ;; *) false ;; esac
verdict $? "  and the last line says CFLAGS"
CFLAGS=-g CPPFLAGS=-DSOMETHING LDFLAGS=-L/nowhere LDLIBS=-lm plan
kept && after "$(compiled)" -DSOMETHING -g && ! has "$(compiled)" -L/nowhere && has "$(linked)" -L/nowhere && after "$(linked)" -lm -lm
verdict $? "the environment's CFLAGS, CPPFLAGS, LDFLAGS and LDLIBS: compiler and linker get them"
case $(last) in *'CPPFLAGS="-DSOMETHING" CFLAGS="-g" LDFLAGS="-L/nowhere" LDLIBS="-lm"'*) ;; *) false ;; esac
verdict $? "  and the last line says them"
plan CFLAGS=-fno-openmp
told && [ "$omp" -eq 0 ]
verdict $? "make CFLAGS=-fno-openmp: no OpenMP, and so it is said"
plan NO_OMP=1 NO_BLAS=1 PORTABLE=1 CFLAGS=-O2
told && [ "$omp$blas" = 00 ] && ! compiled | grep -q -e '-m[a-z]*=native' && last | grep -q 'portable, CFLAGS="-O2"'
verdict $? "make NO_OMP=1 NO_BLAS=1 PORTABLE=1 CFLAGS=-O2: none of them"
BLAS=-lother OMP=-fopenmp plan NO_OMP=1 NO_BLAS=1
told && [ "$omp$blas" = 00 ]
verdict $? "  nor if the environment has variables of these names"
machine=$("$cc" -dumpmachine 2> /dev/null)
case $machine in
x86_64*)
    plan CFLAGS=-march=x86-64
    kept && ! has "$(compiled)" -march=native && case $(last) in *', -march=x86-64, '*) ;; *) false ;; esac
    verdict $? "make CFLAGS=-march=x86-64: instead of -march=native, and so it is said" ;;
esac
plan "CFLAGS=-DTEXT='\"it is\"'"
told && compiled | grep -q -F -e "-DTEXT='\"it is\"'"
verdict $? "quotation marks in CFLAGS"

# An object and a program for real.
quietly() { "$@" > out 2>&1; }
quietly ${MAKE:-make} CFLAGS="-O0 -g0 -Werror -DGIVEN" NO_BLAS=1 NO_MPI=1 build/json.o && [ -f build/json.o ] &&
    grep -q -e '-O3.* -O0 ' build/flags
verdict $? "make CFLAGS=... build/json.o compiles"
quietly ${MAKE:-make} CFLAGS="-O0 -g0 -Werror -DGIVEN" NO_BLAS=1 NO_MPI=1 build/json.o && ! grep -q -e '-c' out
verdict $? "  the second time nothing is compiled"
quietly ${MAKE:-make} CFLAGS="-O0 -g0" NO_BLAS=1 NO_MPI=1 build/json.o && grep -q -e '-c' out
verdict $? "  with other flags it is compiled anew"
for flags in -ffast-math -Ofast -ffinite-math-only; do
    quietly ${MAKE:-make} CFLAGS="-O0 $flags" NO_OMP=1 NO_BLAS=1 NO_MPI=1 build/sampler.o
    [ $? -ne 0 ] && [ "$(grep -c 'error: ' out)" -eq 1 ] && grep -q 'error: .*-ffast-math and -Ofast cannot be used' out
    verdict $? "make CFLAGS=$flags is refused with one error"
done

# CUDA: a compiler that prints what nvcc 13 prints for --dryrun, on a machine with GPUs of these capabilities
nvcc() { # CAPABILITIES...
    { echo '#!/bin/sh'
      echo 'echo asked >> asked'
      echo "echo '#\$ TOP=/usr/local/cuda/bin/..' >&2"
      echo 'case " $* " in *" -arch=native "*) ;; *) exit ;; esac'
      [ $# -gt 0 ] || echo "echo \"nvcc warning : Cannot find valid GPU for '-arch=native', default arch is used\" >&2"
      for capability in ${@:-75}; do
          echo "echo '#\$ \"/usr/local/cuda/nvvm/bin/cicc\" --c++17 -arch compute_$capability -m64 x.ii' >&2"
      done; } > nvcc
    chmod +x nvcc
    rm -f asked
}
gpu_code() { sed -n "s/.*nvcc \(.*\) -std=c++17 -O3 -default-stream per-thread -Xcompiler.* -c megalodon.cu -o .*megalodon$1.o\$/\\1/p" out; }
both='-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90,code=compute_90'
turing='-gencode arch=compute_75,code=sm_75'
fallback='nvcc finds no GPU of compute capability 7.5 or more on this machine: building for CUARCH="75 80 90"'
nvcc
plan NVCC=./nvcc && plan NVCC=./nvcc help && plan NVCC=./nvcc test && [ ! -e asked ]
verdict $? "make, make help and make test do not run nvcc"
plan NVCC=./nvcc cuda
[ "$(gpu_code)" = "$both" ] && [ "$(grep -c -F -e "$fallback" out)" -eq 1 ] && case $(last) in *'for sm 75 80 90.'*) ;; *) false ;; esac
verdict $? "make cuda without a GPU: bfloat16 for CUARCH=\"80 90\", and one line says so"
[ "$(gpu_code _fp32)" = "$turing $both" ]
verdict $? "  and float32 for 75, too"
nvcc 70
plan NVCC=./nvcc cuda && [ "$(gpu_code)" = "$both" ] && grep -q -F -e "$fallback" out
verdict $? "  likewise with a GPU of compute capability 7.0"
nvcc 75
plan NVCC=./nvcc cuda && [ "$(gpu_code _fp32)" = "$turing -gencode arch=compute_75,code=compute_75" ] && [ -z "$(gpu_code)" ] &&
    ! grep -q 'nvcc finds' out
verdict $? "  with a GPU of compute capability 7.5: float32 only"
nvcc 90
plan NVCC=./nvcc cuda && [ "$(gpu_code)" = "${both#* * }" ] && ! grep -q 'nvcc finds' out
verdict $? "  with a GPU of 9.0: for sm_90a"
nvcc 86 120
plan NVCC=./nvcc cuda && [ "$(gpu_code)" = -arch=native ] && ! grep -q 'nvcc finds' out
verdict $? "  with GPUs of 8.6 and 12.0: for these"
nvcc
plan NVCC=./nvcc cuda CUARCH=90 && [ "$(gpu_code)" = "${both#* * }" ] && ! grep -q 'nvcc finds' out
verdict $? "  with CUARCH=90: for that"
CUARCH=90 plan NVCC=./nvcc cuda && [ "$(gpu_code)" = "${both#* * }" ]
verdict $? "  also from the environment"
plan NVCC=./nvcc cuda CUARCH=90 NVCCFLAGS=-lineinfo LDFLAGS=-Wl,-z,now
grep -q -e '-Xcompiler -Wall,-Wextra  *-lineinfo .*-c megalodon.cu' out && grep -q -F -e "-Xcompiler '-Wl\\,-z\\,now' " out
verdict $? "  NVCCFLAGS and LDFLAGS reach nvcc"
plan NVCC=./nvcc test-emulated CXXFLAGS=-O1 && grep -q -e '-O2 .*-O1 .*-c -x c++ build/emulated/megalodon.cu' out
verdict $? "make test-emulated CXXFLAGS=-O1: reaches the C++ compiler"
quietly ${MAKE:-make} cuda NVCC=
[ $? -ne 0 ] && grep -q 'no nvcc: put it on the PATH' out
verdict $? "make cuda without nvcc says what is missing"

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
