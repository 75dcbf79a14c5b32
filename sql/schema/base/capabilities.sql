-- Capabilities: what a role may do here, granted and revoked as a whole. They are enforced by PostgreSQL's own
-- privileges, so that verification checks nothing more and a dump includes them; the table records what was granted, so
-- that an upgrade can grant what is new.

CREATE TABLE tollgate.capabilities (
    role       text        NOT NULL,
    -- Roles can be renamed, and a name given to another role. NULL after a restore into a cluster without such a role.
    role_oid   oid,
    capability text        NOT NULL CHECK (capability IN ('verifier', 'issuer', 'admin', 'operator', 'key_fetcher', 'gateway')),
    granted_at timestamptz NOT NULL DEFAULT now(),
    granted_by text        NOT NULL DEFAULT tollgate.acting_role(),
    CONSTRAINT capabilities_key UNIQUE (role_oid, capability)
);
COMMENT ON TABLE tollgate.capabilities IS 'The capabilities granted with grant_capability, and by whom';
COMMENT ON COLUMN tollgate.capabilities.role_oid IS 'The role in this cluster, whatever its current name';
-- In another cluster only the name identifies the role, so a row whose name now belongs to another role is not dumped.
SELECT pg_extension_config_dump('tollgate.capabilities',
    'WHERE EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid = role_oid AND r.rolname = role)');

CREATE FUNCTION tollgate.resolve_capability_role() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.role_oid := (SELECT r.oid FROM pg_roles r WHERE r.rolname = NEW.role);
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION tollgate.resolve_capability_role() IS 'Trigger that looks up the role of a capability in this cluster, also after a restore. Internal.';

CREATE TRIGGER resolve_role BEFORE INSERT ON tollgate.capabilities
    FOR EACH ROW EXECUTE FUNCTION tollgate.resolve_capability_role();
ALTER TABLE tollgate.capabilities ENABLE ALWAYS TRIGGER resolve_role;

-- Logical replication replicates neither roles nor privileges, so a replicated row would grant nothing. The role may be
-- unknown, so there is no key to find a row by.
ALTER TABLE tollgate.capabilities REPLICA IDENTITY FULL;
CREATE TRIGGER leave_out BEFORE INSERT OR UPDATE OR DELETE ON tollgate.capabilities
    FOR EACH ROW WHEN (tollgate.is_logical_worker()) EXECUTE FUNCTION tollgate.leave_out();
ALTER TABLE tollgate.capabilities ENABLE REPLICA TRIGGER leave_out;

-- Fired by an upgrade, and by restoring a dump. Deferred to the commit, because privileges granted by an extension
-- script become the object's initial privileges, which a dump leaves out and which in PostgreSQL 17 prevent a role from
-- being dropped.
CREATE FUNCTION tollgate.renew_capability() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM tollgate.capabilities c JOIN pg_roles r ON r.oid = c.role_oid
               WHERE c.role_oid = NEW.role_oid AND c.capability = NEW.capability) THEN
        PERFORM tollgate.give_capability(NEW.role_oid, NEW.capability);
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION tollgate.renew_capability() IS 'Trigger that grants again what a recorded capability includes now. Internal.';

CREATE CONSTRAINT TRIGGER renew AFTER INSERT OR UPDATE ON tollgate.capabilities
    DEFERRABLE INITIALLY DEFERRED
    -- Rows of this transaction were granted by it already.
    FOR EACH ROW WHEN (NEW.granted_at < now()) EXECUTE FUNCTION tollgate.renew_capability();

CREATE FUNCTION tollgate.check_capability(role regrole, capability text) RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF $2 IS NULL OR $2 NOT IN ('verifier', 'issuer', 'admin', 'operator', 'key_fetcher', 'gateway') THEN
        RAISE EXCEPTION 'there is no capability %', tollgate.quote_redacted($2)
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: capability.',
                  HINT = 'It is one of verifier, issuer, admin, operator, key_fetcher and gateway.';
    END IF;
    IF $1 IS NULL OR $1 = 0 THEN
        RAISE EXCEPTION 'a capability belongs to a role'
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: role, which is NULL or PUBLIC.',
                  HINT = 'Name the role that your application logs in as. Functions open to everyone need no capability.';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = $1) THEN
        RAISE EXCEPTION 'there is no such role'
            USING ERRCODE = 'undefined_object', DETAIL = format('Argument: role, of %s.', $1::oid), HINT = 'CREATE ROLE creates one.';
    END IF;
    -- This runs as the owner, whose own privileges everything else depends on.
    IF pg_get_userbyid($1) = current_user THEN
        RAISE EXCEPTION 'role % owns the extension, and may do everything', $1
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: role.',
                  HINT = 'Name the role that your application logs in as, which should own nothing of Tollgate.';
    END IF;
    -- A snapshot from before the lock would show the earlier capabilities.
    PERFORM tollgate.check_read_committed('capabilities cannot be changed', 'It may not see those that were just granted.', 'Change them');
END
$$;
COMMENT ON FUNCTION tollgate.check_capability(regrole, text) IS 'Raises unless the capability exists and the role may have it. Internal.';

CREATE FUNCTION tollgate.hide_bind_values(role oid) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    setting text;
BEGIN
    -- Only in this database: the role handles tokens for this grant nowhere else, and a database-specific setting
    -- overrides one made for the role in general.
    FOREACH setting IN ARRAY '{log_parameter_max_length, log_parameter_max_length_on_error}'::text[] LOOP
        BEGIN
            EXECUTE format('ALTER ROLE %I IN DATABASE %I SET %I = 0', pg_get_userbyid($1), current_database(), setting);
        EXCEPTION WHEN insufficient_privilege THEN
            RAISE NOTICE 'the bind values of role %, which may be tokens, are not kept out of the server''s log', quote_ident(pg_get_userbyid($1))
                USING DETAIL = format('The owner of the extension, %I, may not set %s for it.', current_user, setting),
                      HINT = format('As a role that may: ALTER ROLE %I SET %I = 0;', pg_get_userbyid($1), setting);
        END;
    END LOOP;
END
$$;
COMMENT ON FUNCTION tollgate.hide_bind_values(oid) IS
    'Keeps the bind values of a role''s statements in this database, which may be tokens, out of the server''s log, from its next session on. Internal.';

-- Only these objects: reading the privileges on all of ours takes longer the more roles have some.
CREATE FUNCTION tollgate.capability_acls(capability text)
    RETURNS TABLE (object_id oid, object_type text, object text, privilege text, owner oid, acl aclitem[])
    LANGUAGE sql STABLE ROWS 30
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    SELECT o.object_id, o.object_type, o.object, o.privilege, coalesce(p.proowner, c.relowner, t.typowner),
           CASE o.object_type WHEN 'FUNCTION' THEN coalesce(p.proacl, acldefault('f', p.proowner))
                              WHEN 'VIEW' THEN coalesce(c.relacl, acldefault('r', c.relowner))
                              ELSE coalesce(t.typacl, acldefault('T', t.typowner)) END
        FROM tollgate.capability_objects($1) o
            LEFT JOIN pg_proc p ON p.oid = o.object_id AND o.object_type = 'FUNCTION'
            LEFT JOIN pg_class c ON c.oid = o.object_id AND o.object_type = 'VIEW'
            LEFT JOIN pg_type t ON t.oid = o.object_id AND o.object_type = 'TYPE';
END;
COMMENT ON FUNCTION tollgate.capability_acls(text) IS 'The objects that a capability grants something on, with the privileges on them. Internal.';

CREATE FUNCTION tollgate.give_capability(role oid, capability text) RETURNS boolean
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    given record;
    is_new boolean := false;
BEGIN
    FOR given IN SELECT o.* FROM tollgate.capability_acls($2) o WHERE NOT o.acl @> makeaclitem($1, o.owner, o.privilege, false) LOOP
        is_new := true;
        EXECUTE format('GRANT %s ON %s %s TO %I', given.privilege,
            CASE given.object_type WHEN 'VIEW' THEN 'TABLE' ELSE given.object_type END, given.object, pg_get_userbyid($1));
    END LOOP;
    -- A superuser decides what PostgreSQL logs of a superuser; the role was not one when it was granted this.
    IF NOT (SELECT r.rolsuper FROM pg_roles r WHERE r.oid = $1) THEN
        PERFORM tollgate.hide_bind_values($1);
    END IF;
    RETURN is_new;
END
$$;
COMMENT ON FUNCTION tollgate.give_capability(oid, text) IS 'Grants a role the privileges of a capability that it lacks; returns whether there were any. Internal.';

CREATE FUNCTION tollgate.forget_dropped_roles() RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM tollgate.capabilities c WHERE pg_get_userbyid(c.role_oid) IS DISTINCT FROM c.role) THEN
        RETURN;
    END IF;
    WITH forgotten AS (
        DELETE FROM tollgate.capabilities c WHERE NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = c.role_oid)
            RETURNING c.role, c.capability
    )
    INSERT INTO tollgate.audit_log (event, detail)
        SELECT 'capability.revoked', jsonb_build_object('role', f.role, 'capability', f.capability, 'reason', 'the role no longer exists')
        FROM forgotten f;
    UPDATE tollgate.capabilities c SET role = r.rolname FROM pg_roles r WHERE r.oid = c.role_oid AND r.rolname <> c.role;
END
$$;
COMMENT ON FUNCTION tollgate.forget_dropped_roles() IS
    'Removes the capabilities of dropped roles, and updates the names of renamed ones. Internal.';

CREATE FUNCTION tollgate.grant_capability(role regrole, capability text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    target pg_roles;
    is_new boolean;
BEGIN
    PERFORM tollgate.check_capability($1, $2);
    SELECT r.* INTO target FROM pg_roles r WHERE r.oid = $1;
    IF target.rolsuper OR starts_with(target.rolname, 'pg_') THEN
        RAISE EXCEPTION 'role % is %', $1, CASE WHEN target.rolsuper THEN 'a superuser, which may do everything' ELSE 'one of PostgreSQL''s own' END
            USING ERRCODE = 'invalid_parameter_value', DETAIL = 'Argument: role.',
                  HINT = 'Name an ordinary role, such as the one that your application logs in as.';
    END IF;
    -- One at a time: PostgreSQL does not queue concurrent changes of one object's privileges.
    LOCK TABLE tollgate.capabilities IN SHARE ROW EXCLUSIVE MODE;
    PERFORM tollgate.forget_dropped_roles();

    is_new := tollgate.give_capability($1, $2);
    INSERT INTO tollgate.capabilities (role, capability) VALUES (target.rolname, $2) ON CONFLICT ON CONSTRAINT capabilities_key DO NOTHING;
    IF FOUND OR is_new THEN
        INSERT INTO tollgate.audit_log (event, detail)
            VALUES ('capability.granted', jsonb_build_object('role', target.rolname, 'capability', $2));
    END IF;
    IF NOT target.rolcanlogin THEN
        RAISE NOTICE 'roles that inherit this capability from % may have bind values, which may be tokens, in the server''s log', $1
            USING DETAIL = 'PostgreSQL only uses the settings of the role that logs in.',
                  HINT = 'Grant the capability to each role that logs in, or set log_parameter_max_length and log_parameter_max_length_on_error to 0 for them.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.grant_capability(regrole, text) IS
    'Grants a role a capability (verifier, issuer, admin, operator, key_fetcher or gateway), and keeps its bind values in this database out of the server''s log, from its next session on; event capability.granted, unless it had it already';

CREATE FUNCTION tollgate.revoke_capability(role regrole, capability text) RETURNS void
    LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    taken   record;
    changed boolean;
    left_by text;
BEGIN
    PERFORM tollgate.check_capability($1, $2);
    LOCK TABLE tollgate.capabilities IN SHARE ROW EXCLUSIVE MODE;
    PERFORM tollgate.forget_dropped_roles();

    DELETE FROM tollgate.capabilities c WHERE c.role_oid = $1 AND c.capability = $2;
    changed := FOUND;
    -- Privileges granted by hand are revoked too; those that another capability of the role includes stay.
    FOR taken IN
        SELECT o.* FROM tollgate.capability_acls($2) o
        WHERE EXISTS (SELECT FROM aclexplode(o.acl) a WHERE a.grantee = $1)
          AND NOT EXISTS (SELECT FROM tollgate.capabilities c, tollgate.capability_objects(c.capability) k
                          WHERE c.role_oid = $1 AND k.object_id = o.object_id)
    LOOP
        EXECUTE format('REVOKE ALL ON %s %s FROM %I CASCADE',
            CASE taken.object_type WHEN 'VIEW' THEN 'TABLE' ELSE taken.object_type END, taken.object, pg_get_userbyid($1));
        changed := true;
    END LOOP;
    IF changed THEN
        INSERT INTO tollgate.audit_log (event, detail)
            VALUES ('capability.revoked', jsonb_build_object('role', pg_get_userbyid($1), 'capability', $2));
    END IF;

    -- Report it if the role keeps any of the privileges in another way.
    SELECT string_agg(CASE p.grantee WHEN 0 THEN 'PUBLIC' ELSE p.grantee::regrole::text END, ', ' ORDER BY p.grantee) INTO left_by
        FROM (SELECT DISTINCT a.grantee FROM tollgate.capability_acls($2) o, aclexplode(o.acl) a WHERE a.grantee <> o.owner) p
        WHERE p.grantee = 0 OR pg_has_role($1, p.grantee, 'MEMBER');
    IF left_by IS NOT NULL THEN
        RAISE NOTICE 'role % still has privileges of %', $1, $2
            USING DETAIL = format('They come from grants to: %s.', left_by),
                  HINT = 'tollgate.capability_grants shows all grants, and the members of each role.';
    END IF;
END
$$;
COMMENT ON FUNCTION tollgate.revoke_capability(regrole, text) IS
    'Revokes from a role the privileges of a capability, except those that another of its capabilities includes; event capability.revoked, unless it had none of them. The role''s bind values stay out of the log';

CREATE FUNCTION tollgate.list_capability_grants() RETURNS TABLE (
        role text, capability text, granted_at timestamptz, granted_by text, state text, objects text[], members text[])
    LANGUAGE sql STABLE PARALLEL SAFE SECURITY DEFINER ROWS 10
    SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    WITH held AS MATERIALIZED (
        SELECT p.object_id, p.object, p.owner, p.grantee, p.privilege FROM tollgate.object_privileges p
    ), due AS MATERIALIZED (
        SELECT c.role_oid, c.capability, o.object_id, o.object, o.privilege
        FROM tollgate.capabilities c, tollgate.capability_objects(c.capability) o
    ), lacking AS (
        SELECT d.role_oid, d.capability, array_agg(d.object ORDER BY d.object) AS objects
        FROM due d LEFT JOIN held p ON p.object_id = d.object_id AND p.grantee = d.role_oid AND p.privilege = d.privilege
        WHERE p.object_id IS NULL
        GROUP BY d.role_oid, d.capability
    ), by_hand AS (
        SELECT p.grantee, array_agg(DISTINCT p.object ORDER BY p.object) AS objects
        FROM held p LEFT JOIN due d ON d.role_oid = p.grantee AND d.object_id = p.object_id AND d.privilege = p.privilege
        WHERE p.grantee NOT IN (0, p.owner) AND d.object_id IS NULL
        GROUP BY p.grantee
    ), listed AS (
        SELECT c.role_oid, coalesce(r.rolname, c.role) AS role, c.capability, c.granted_at, c.granted_by,
               CASE WHEN r.oid IS NULL THEN 'no such role' WHEN l.objects IS NULL THEN 'granted' ELSE 'incomplete' END AS state,
               CASE WHEN r.oid IS NULL THEN '{}' ELSE coalesce(l.objects, '{}') END AS objects
        FROM tollgate.capabilities c
            LEFT JOIN pg_roles r ON r.oid = c.role_oid
            LEFT JOIN lacking l ON l.role_oid = c.role_oid AND l.capability = c.capability
        UNION ALL
        SELECT h.grantee, pg_get_userbyid(h.grantee), NULL, NULL, NULL, 'by hand', h.objects FROM by_hand h
    )
    SELECT l.role, l.capability, l.granted_at, l.granted_by, l.state, l.objects,
           -- From the role downwards: checking for every role whether it is a member of each would take quadratic time.
           ARRAY(WITH RECURSIVE member AS (
                     SELECT m.member FROM pg_auth_members m WHERE m.roleid = l.role_oid
                     UNION
                     SELECT m.member FROM member o JOIN pg_auth_members m ON m.roleid = o.member
                 )
                 SELECT r.rolname::text FROM member o JOIN pg_roles r ON r.oid = o.member WHERE NOT r.rolsuper ORDER BY r.rolname)
    FROM listed l ORDER BY l.role, l.capability;
END;
COMMENT ON FUNCTION tollgate.list_capability_grants() IS 'The rows of the view capability_grants';

CREATE VIEW tollgate.capability_grants AS
    SELECT g.role, g.capability, g.granted_at, g.granted_by, g.state, g.objects, g.members FROM tollgate.list_capability_grants() g;
COMMENT ON VIEW tollgate.capability_grants IS
    'Which role may do what. By state: granted; incomplete, when some privileges of the capability (objects) are missing; by hand, for privileges (objects) that belong to no capability of the role; no such role. Members of a role may do the same';
