# SPDX-License-Identifier: (Apache-2.0 OR MIT)

from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyHpccomm(PythonPackage):
    """Faster, safer collectives and gradient synchronisation for training on MPI clusters."""

    # Spack takes the homepage from this; the checksum is that of the release's sdist.
    pypi = "hpccomm/hpccomm-0.1.0.tar.gz"

    license("Apache-2.0", checked_by="hpccomm")

    version("0.1.0", sha256="0000000000000000000000000000000000000000000000000000000000000000")

    variant("plot", default=True, description="Draw schedules and measurements")
    variant("cuda", default=False, description="Arrays on CUDA devices")

    depends_on("python@3.10:", type=("build", "run"))
    depends_on("py-setuptools@64:", type="build")
    depends_on("py-mpi4py@4:", type=("build", "run"))
    depends_on("py-numpy@1.24:", type=("build", "run"))
    depends_on("py-numba@0.59:", type=("build", "run"), when="target=x86_64:,aarch64:")
    depends_on("py-matplotlib@3.7:", type="run", when="+plot")
    depends_on("py-cupy@13:", type="run", when="+cuda")

    @run_after("install")
    @on_package_attributes(run_tests=True)
    def check_machine(self):
        python("-m", "hpccomm", "verify", "all", "--size", "1:8")
