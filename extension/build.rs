//! The SQL that pgrx generates is kept in a section of the library that nothing refers to, and which linkers drop when
//! they collect garbage. Said here, it holds for every build, whatever RUSTFLAGS are set, and for the library only.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let target = |name: &str| std::env::var(format!("CARGO_CFG_TARGET_{name}")).unwrap_or_default();
    if target("FAMILY") == "unix" && target("VENDOR") != "apple" {
        println!("cargo::rustc-link-arg-cdylib=-Wl,--no-gc-sections");
    }
}
