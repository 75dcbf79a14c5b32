//! How the sources are laid out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use syn::visit::{self, Visit};
use syn::{Attribute, ItemMod, ItemUse, UseTree, Visibility};

/// Paths that a file names, as far as they begin with `crate`, `super` or `self`; unit tests are left out.
#[derive(Default)]
struct Named(Vec<Vec<String>>);

impl Named {
    fn use_tree(&mut self, before: &[String], tree: &UseTree) {
        let with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            UseTree::Path(path) => self.use_tree(&with(&path.ident), &path.tree),
            UseTree::Name(name) => self.0.push(with(&name.ident)),
            UseTree::Rename(rename) => self.0.push(with(&rename.ident)),
            UseTree::Glob(_) => self.0.push(before.to_vec()),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.use_tree(before, tree)),
        }
    }
}

fn is_of_unit_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|a| {
        a.path().is_ident("cfg") && a.parse_args::<syn::Path>().is_ok_and(|path| path.is_ident("test"))
    })
}

impl Visit<'_> for Named {
    fn visit_item_mod(&mut self, module: &ItemMod) {
        if !is_of_unit_tests(&module.attrs) {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_use(&mut self, item: &ItemUse) {
        self.use_tree(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &syn::Path) {
        self.0.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    // `pub(in crate::http)` names no other file.
    fn visit_visibility(&mut self, _: &Visibility) {}
}

/// The module path of each Rust file below a directory.
fn modules(root: &Path) -> Result<BTreeMap<Vec<String>, PathBuf>> {
    let mut modules = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let relative = path.strip_prefix(root)?.with_extension("");
                let mut module: Vec<String> =
                    relative.iter().map(|part| part.to_string_lossy().into_owned()).collect();
                if module.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
                    module.pop();
                }
                modules.insert(module, path);
            }
        }
    }
    Ok(modules)
}

/// What each file of a crate names of the others.
fn uses(root: &Path) -> Result<BTreeMap<Vec<String>, BTreeSet<Vec<String>>>> {
    let modules = modules(root)?;
    let mut uses = BTreeMap::new();
    for (module, file) in &modules {
        let source = fs::read_to_string(file)?;
        let mut named = Named::default();
        named.visit_file(&syn::parse_file(&source).with_context(|| file.display().to_string())?);
        let mut others = BTreeSet::new();
        for path in named.0 {
            let ups = path.iter().take_while(|part| *part == "super").count();
            let mut full = match path.first().map(String::as_str) {
                Some("crate") => path[1..].to_vec(),
                Some("self") => [&module[..], &path[1..]].concat(),
                // In a module within the file, `super` is the file.
                Some("super") => [&module[..module.len().saturating_sub(ups)], &path[ups..]].concat(),
                // A file of this module's folder, which it declares.
                Some(first) if modules.contains_key(&[&module[..], &[first.to_owned()]].concat()) => {
                    [&module[..], &path[..]].concat()
                }
                _ => continue,
            };
            while !modules.contains_key(&full) && full.pop().is_some() {}
            if full != *module {
                others.insert(full);
            }
        }
        uses.insert(module.clone(), others);
    }
    Ok(uses)
}

/// A file that cannot be understood without another, which cannot be understood without it.
#[test]
fn no_files_use_each_other_in_a_circle() -> Result<()> {
    let workspace =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("this crate is in the workspace")?;
    let crates = [
        "daemon/src",
        "extension/src",
        "extension/core/src",
        "tests/src",
        "tests/src/bin/bench",
        "tests/tests/it",
    ];
    for root in crates {
        let mut uses = uses(&workspace.join(root))?;
        assert!(uses.len() > 5, "{root} has {} files", uses.len());
        // Whatever uses nothing that is left is in no circle.
        loop {
            let before = uses.len();
            let left: BTreeSet<_> = uses.keys().cloned().collect();
            uses.retain(|_, others| others.iter().any(|other| left.contains(other)));
            if uses.len() == before {
                break;
            }
        }
        let mut circle = Vec::new();
        let mut next = uses.keys().next();
        while let Some(file) = next.filter(|file| !circle.contains(*file)) {
            circle.push(file.clone());
            next = uses[file].iter().find_map(|other| uses.get_key_value(other).map(|(key, _)| key));
        }
        let circle: Vec<String> = circle.iter().map(|file| file.join("::")).collect();
        assert!(circle.is_empty(), "in {root}: {}", circle.join(" uses "));
    }
    Ok(())
}
