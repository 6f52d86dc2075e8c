//! Compiles `src/aten.cpp` against the torch that torch-sys has found, and tells the crate which torch that was.

use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/aten.cpp");

    let missing = |what: String| io::Error::new(io::ErrorKind::NotFound, what);
    let lib = env::var("DEP_TCH_LIBTORCH_LIB")
        .map_err(|e| missing(format!("DEP_TCH_LIBTORCH_LIB of torch-sys: {e}")))?;
    let lib = Path::new(&lib);
    let torch = lib
        .parent()
        .ok_or_else(|| missing(format!("nothing above {}", lib.display())))?;
    println!(
        "cargo:rerun-if-changed={}",
        torch.join("version.py").display()
    );

    // `__version__ = '2.11.0+cu130'`: what the module compares with the torch it is imported under.
    let version_py = fs::read_to_string(torch.join("version.py"))?;
    let version = version_py
        .lines()
        .find_map(|line| {
            line.strip_prefix("__version__ = '")?
                .split(['+', '\''])
                .next()
        })
        .ok_or_else(|| {
            missing(format!(
                "__version__ in {}",
                torch.join("version.py").display()
            ))
        })?;
    println!("cargo:rustc-env=IGM_TORCH_VERSION={version}");

    let include = torch.join("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .pic(true)
        .opt_level(2)
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .flag("-isystem")
        .flag(&include)
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include"))
        .file("src/aten.cpp")
        .compile("igm_aten");

    println!("cargo:rustc-link-search=native={}", lib.display());
    for library in ["torch_cpu", "torch_python", "c10"] {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
    Ok(())
}
