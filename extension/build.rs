//! pgrx keeps the SQL that it generates in a section of the library to which nothing refers, and which linkers drop
//! when they collect garbage. Passed here, the linker flag applies to every build, whatever RUSTFLAGS are set, and to
//! this library only.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let target = |name: &str| std::env::var(format!("CARGO_CFG_TARGET_{name}")).unwrap_or_default();
    if target("FAMILY") == "unix" && target("VENDOR") != "apple" {
        println!("cargo::rustc-link-arg-cdylib=-Wl,--no-gc-sections");
    }
}
