-- Answers writes of data objects as S3 does and throws the bytes away. Everything else goes to the real server: reads,
-- lists, deletes, copies, and above all what a checkpoint is committed by (COMMIT, manifests, DCP's .metadata, probes).
local var, method, args = ngx.var, ngx.req.get_method(), ngx.var.args or ""
local size, rate = tonumber(var.http_content_length) or 0, tonumber(var.rate)
if rate > 0 then ngx.sleep(tonumber(var.wait_s) + size / rate) end

local is_data = var.uri:find("%.safetensors$") or var.uri:find("%.distcp$") or var.uri:find("%.bin$")
local is_write = method == "PUT" or method == "POST" or (method == "DELETE" and args:find("uploadId=", 1, true))
if not is_data or not is_write or var.http_x_amz_copy_source then return ngx.exec("@real") end

local function xml(name, body)
  ngx.header["Content-Type"] = "application/xml"
  local bucket, key = var.uri:match("^/([^/]+)/(.+)$")
  return ngx.print('<?xml version="1.0" encoding="UTF-8"?><', name, "><Bucket>", bucket, "</Bucket><Key>", key, "</Key>",
    body, "</", name, ">")
end

ngx.req.discard_body()
if method == "PUT" then  -- a part, or a whole object
  ngx.header["ETag"] = '"d41d8cd98f00b204e9800998ecf8427e"'
  ngx.header["Content-Length"] = 0
  return ngx.exit(200)
elseif method == "DELETE" then
  return ngx.exit(204)
elseif args:find("uploadId=", 1, true) then
  return xml("CompleteMultipartUploadResult", '<Location>sink</Location><ETag>"d41d8cd98f00b204e9800998ecf8427e-1"</ETag>')
end
return xml("InitiateMultipartUploadResult", "<UploadId>sink</UploadId>")
